"""Continuous batching over ONNX Runtime: one thread that owns the session, and a queue in front of it.

The loop reads in one screen: take what clients asked for -> a chunk's worth of prompts -> one token for every
live row -> hand out the text. A failing step fails the requests it held, then the session is opened again with
growing pauses; `state` says which.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from prune2serve.progress import say
from prune2serve.serve.detokenize import IncrementalDecoder, TextStream
from prune2serve.serve.exposition import EngineMetrics
from prune2serve.serve.generation import Delta, FinishReason, SamplingParams, Sequence, TokenLogprob
from prune2serve.serve.ort_scheduler import Scheduler
from prune2serve.serve.sampling import NotFiniteError, choose, describe, log_softmax

State = Literal["starting", "ready", "failed", "stopped"]
MAX_RESTART_PAUSE_S = 30.0
STABLE_S = 60.0
"""An engine that ran this long before it failed starts again with the shortest pause."""


class QueueFullError(Exception):
    """No more requests may wait."""


class EngineUnavailableError(Exception):
    """The engine is not ready: starting again after a failure, or stopping."""


class Runner(Protocol):
    """What the loop needs of a session; see `ort_session.ModelRunner`."""

    options: Any
    cache: Any
    vocab_size: int
    provider: str

    def prefill(self, row: int, ids: list[int], start: int, *, every: bool = False) -> np.ndarray: ...

    def decode(self, tokens: list[int], lengths: list[int]) -> np.ndarray: ...


class OrtEngine:
    """Continues prompts; thread-safe."""

    def __init__(
        self,
        open_runner: Callable[[], Runner],
        decode: Callable[[list[int], bool], str],
        eos_ids: frozenset[int],
        *,
        max_waiting: int = 256,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Open the session and start the loop.

        Args:
            open_runner: opens the session; called again after a failure.
            decode: token ids and whether to leave out special tokens -> text.
            eos_ids: the model's own end tokens.
            max_waiting: requests that may wait for a row.
            metrics: counted into when given.
        """
        self._open_runner, self._decode_ids, self._eos_ids = open_runner, decode, eos_ids
        self._max_waiting = max_waiting
        self.metrics = metrics or EngineMetrics("model")
        self.runner = open_runner()
        self.max_length: int = self.runner.options.max_length
        self._scheduler = Scheduler(self.runner.options.num_rows)
        self._wake = threading.Condition()
        self._arrived: list[Sequence] = []
        self._any_cancelled = False
        self.state: State = "ready"
        self._thread = threading.Thread(target=self._serve, name="ort-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: list[int], params: SamplingParams, emit: Callable[[Delta], None]) -> Sequence:
        """Queue a prompt; `emit` gets its deltas on the engine's thread, the last one with a finish reason.

        The prompt must have at least one token and leave room for one more below `max_length`.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            EngineUnavailableError: the engine failed and is starting again, or is stopping.
        """
        room = self.max_length - len(prompt_ids)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        decoder = IncrementalDecoder(lambda ids: self._decode_ids(ids, params.skip_special_tokens), prompt_ids)
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        sequence = Sequence(
            prompt_ids,
            params,
            emit,
            TextStream(decoder, params.stop, params.include_stop_str_in_output),
            stop_ids,
            np.random.default_rng(seed),
        )
        with self._wake:
            if self.state != "ready":
                raise EngineUnavailableError(f"the engine is {self.state}")
            if len(self._arrived) + len(self._scheduler.waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already")
            self._arrived.append(sequence)
            self._wake.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence and free its row before the next step; nothing more is emitted for it."""
        with self._wake:
            if not sequence.finished:
                sequence.cancelled = self._any_cancelled = True
                self._wake.notify()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Abort what is left and end the thread."""
        with self._wake:
            self.state = "stopped"
            self._wake.notify()
        self._thread.join(timeout_s)

    @property
    def num_active(self) -> int:
        """Sequences in a row or waiting for one."""
        return self._scheduler.num_active + len(self._scheduler.waiting) + len(self._arrived)

    def _serve(self) -> None:
        pause_s = 0.5
        while self.state != "stopped":
            started_s = time.monotonic()
            try:
                self._loop()
            except Exception as error:
                # Whatever broke the session, clients must get an answer and the next ones a working engine.
                traceback.print_exc()
                pause_s = 0.5 if time.monotonic() - started_s > STABLE_S else pause_s
                self._fail(f"the engine failed: {type(error).__name__}")
                pause_s = self._reopen(pause_s)
        self._fail("the server is stopping")

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._scheduler.busy or self._arrived or self.state == "stopped"):
                    self._wake.wait()
                if self.state == "stopped":
                    return
                for sequence in self._arrived:
                    self._scheduler.add(sequence)
                self._arrived.clear()
                check, self._any_cancelled = self._any_cancelled, False
            if check:
                self._drop_cancelled()
            self._prefill_step()
            self._decode_step()
            self.metrics.observe_load(self._scheduler, self.max_length)

    def _reopen(self, pause_s: float) -> float:
        """Open the session again, with growing pauses; return the pause after the next failure."""
        while self.state != "stopped":
            say(f"The engine failed; starting it again in {pause_s:g} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_RESTART_PAUSE_S)
            try:
                self.runner = self._open_runner()
            except Exception:
                traceback.print_exc()
                continue
            with self._wake:
                if self.state == "failed":
                    self.state = "ready"
            say("The engine is ready again")
            break
        return pause_s

    def _fail(self, why: str) -> None:
        with self._wake:
            if self.state != "stopped":
                self.state = "failed"
            lost = [*self._scheduler.clear(), *self._arrived]
            self._arrived.clear()
        for sequence in lost:
            if not sequence.cancelled:
                self._end(sequence, "error", error=why)
        self.metrics.observe_load(self._scheduler, self.max_length)

    def _drop_cancelled(self) -> None:
        scheduler = self._scheduler
        prefilling = [scheduler.prefilling] if scheduler.prefilling else []
        for sequence in [*scheduler.running, *prefilling, *scheduler.waiting]:
            if sequence.cancelled:
                self._release(sequence)
                sequence.finished = True
                self.metrics.observe_finish(sequence, "abort")

    def _prefill_step(self) -> None:
        """Read about one chunk's worth of prompts: a piece of a long one, or several short ones."""
        spent = 0
        while spent < self.runner.options.prefill_chunk:
            chosen = self._scheduler.next_prefill()
            if chosen is None:
                return
            spent += self._prefill_chunk(*chosen)

    def _prefill_chunk(self, sequence: Sequence, row: int) -> int:
        """Read the next chunk of one prompt; return its tokens."""
        if sequence.scheduled_s is None:
            sequence.scheduled_s = time.monotonic()
        start = sequence.num_cached
        chunk = sequence.prompt_ids[start : start + self.runner.options.prefill_chunk]
        every = sequence.params.prompt_logprobs is not None
        logits = self.runner.prefill(row, chunk, start, every=every)
        sequence.num_cached += len(chunk)
        if every:
            self._note_prompt(sequence, logits, start)
        if sequence.num_cached < len(sequence.prompt_ids):
            return len(chunk)
        self._scheduler.promote()
        self.metrics.observe_prompt(sequence)
        if sequence.params.max_tokens == 0:
            self._finish(sequence, "length")
        else:
            self._append(sequence, logits[-1])
        return len(chunk)

    def _note_prompt(self, sequence: Sequence, logits: np.ndarray, start: int) -> None:
        """Keep the log-probability of each prompt token that a chunk's logits [chunk, vocab] predict."""
        table = log_softmax(logits)
        if start == 0:
            sequence.prompt_logprobs.append(None)
        for row, token in zip(table, sequence.prompt_ids[start + 1 : start + 1 + len(table)], strict=False):
            sequence.prompt_logprobs.append(describe(row, token, sequence.params.prompt_logprobs or 0))

    def _decode_step(self) -> None:
        running = list(self._scheduler.running)
        if not running:
            return
        for sequence in running:
            sequence.num_cached += 1
        tokens = [sequence.output_ids[-1] for sequence in running]
        logits = self.runner.decode(tokens, [sequence.num_cached for sequence in running])
        for row, sequence in enumerate(running):
            self._append(sequence, logits[row])

    def _append(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Choose a token, hand out its text, and end the sequence when it is the last."""
        try:
            token, logprob = choose(logits, sequence)
        except NotFiniteError as error:
            self._release(sequence)
            self._end(sequence, "error", error=str(error))
            return
        sequence.output_ids.append(token)
        self.metrics.observe_token(sequence)
        params, stream = sequence.params, sequence.stream
        ended = token in sequence.stop_ids and len(sequence.output_ids) > params.min_tokens
        text = "" if ended and params.skip_special_tokens else stream.push(token)
        logprobs = () if logprob is None else (logprob,)
        reason: FinishReason | None = None
        if ended or stream.stopped:
            reason = "stop"
        elif len(sequence.output_ids) >= params.max_tokens:
            reason = "length"
        if reason is None:
            sequence.emit(self._delta(sequence, text, logprobs))
        else:
            self._finish(sequence, reason, text, logprobs)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        if not sequence.stream.stopped:
            text += sequence.stream.finish()
            if sequence.stream.stopped:  # the last, held-back characters completed a stop string
                reason = "stop"
        self._release(sequence)
        self._end(sequence, reason, text=text, logprobs=logprobs)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> None:
        sequence.finished = True
        self.metrics.observe_finish(sequence, reason)
        delta = self._delta(sequence, text, logprobs, num_tokens=0 if error or not sequence.output_ids else 1)
        sequence.emit(replace(delta, finish_reason=reason, error=error))

    def _delta(self, sequence: Sequence, text: str, logprobs: tuple[TokenLogprob, ...], num_tokens: int = 1) -> Delta:
        prompt = None
        if sequence.prompt_logprobs and len(sequence.output_ids) <= 1:
            prompt = tuple(sequence.prompt_logprobs)
        return Delta(text, num_tokens, logprobs, prompt)

    def _release(self, sequence: Sequence) -> None:
        for move in self._scheduler.release(sequence):
            self.runner.cache.move(move.source, move.target, move.length)
