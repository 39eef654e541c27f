"""The OpenAI-compatible HTTP face of the ONNX Runtime engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prune2serve import __version__
from prune2serve.serve import openai_format as fmt
from prune2serve.serve.exposition import CONTENT_TYPE
from prune2serve.serve.generation import Delta, SamplingParams
from prune2serve.serve.http_guard import (
    ApiError,
    ApiKeyMiddleware,
    EventStream,
    error_body,
    error_response,
    on_api_error,
    on_bug,
    on_disconnect,
    on_http_error,
    read_body,
    unless_gone,
)
from prune2serve.serve.openapi import document
from prune2serve.serve.ort_service import DEFAULT_COMPLETION_TOKENS, Service
from prune2serve.serve.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest

R = TypeVar("R", bound=GenerationRequest)


def create_app(service: Service, *, api_key: str | None = None) -> Starlette:
    """Build the ASGI application. With `api_key`, every path under /v1 needs it."""
    face = _Face(service)
    description = document(needs_key=api_key is not None)

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    routes = [
        Route("/health", face.health),
        Route("/version", face.version),
        Route("/metrics", face.metrics),
        Route("/openapi.json", openapi),
        Route("/v1/models", face.models),
        Route("/v1/models/{name:path}", face.model),
        Route("/v1/completions", face.completions, methods=["POST"]),
        Route("/v1/chat/completions", face.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: on_api_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_bug,
    }
    middleware = [Middleware(ApiKeyMiddleware, api_key=api_key)] if api_key else []
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)


class _Face:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        state = self._service.engine.state
        if state != "ready":
            return error_response(ApiError(503, f"the engine is {state}", code="engine_unavailable"))
        return Response(status_code=200)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._service.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._service.check_model(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "prune2serve",
            "root": service.names[0],
            "parent": None,
            "max_model_len": service.engine.max_length,
        }

    async def completions(self, request: Request) -> Response:
        service = self._service
        asked = await self._read(request, CompletionRequest)
        prompts = await service.completion_prompts(asked)
        default = min(DEFAULT_COMPLETION_TOKENS, service.engine.max_length - max(map(len, prompts)))
        max_tokens = default if asked.max_tokens is None else asked.max_tokens
        if max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens 0 is only allowed with echo: true", param="max_tokens")
        params = service.sampling(asked, prompts, max_tokens, asked.logprobs, asked.logprobs if asked.echo else None)
        answer = fmt.Answer.new("text_completion", asked.model or service.names[0], service.text.token_text)
        offsets: dict[int, int] = {}

        def chunk(index: int, delta: Delta) -> dict[str, Any]:
            offset = offsets.get(index, 0)
            offsets[index] = offset + len(delta.text)
            return fmt.completion_chunk(answer, index, delta, logprobs=asked.logprobs, offset=offset)

        if asked.stream:
            return EventStream(await self._stream(request, asked, prompts, params, answer, chunk, opening=None))
        choices = await self._gather(request, asked, prompts, params)
        return JSONResponse(
            fmt.completion(answer, choices, _prompt_tokens(prompts), logprobs=asked.logprobs, echo=bool(asked.echo))
        )

    async def chat(self, request: Request) -> Response:
        service = self._service
        asked = await self._read(request, ChatCompletionRequest)
        prompts = [await service.chat_prompt(asked)]
        max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        params = service.sampling(asked, prompts, max_tokens, logprobs)
        answer = fmt.Answer.new("chat.completion", asked.model or service.names[0], service.text.token_text)

        def chunk(index: int, delta: Delta | None) -> dict[str, Any]:
            return fmt.chat_chunk(answer, index, delta, logprobs=bool(asked.logprobs))

        if asked.stream:
            return EventStream(await self._stream(request, asked, prompts, params, answer, chunk, opening=chunk))
        choices = await self._gather(request, asked, prompts, params)
        return JSONResponse(fmt.chat(answer, choices, _prompt_tokens(prompts), logprobs=bool(asked.logprobs)))

    async def _read(self, request: Request, kind: type[R]) -> R:
        body = await read_body(request, self._service.limits.max_body_bytes)
        asked = parse(kind, body)
        self._service.check_model(asked.model)
        return asked

    async def _gather(
        self, request: Request, asked: GenerationRequest, prompts: list[list[int]], params: SamplingParams
    ) -> list[fmt.Choice]:
        """Wait for every choice to finish, or raise ClientDisconnect as soon as nobody waits for it."""
        choices = _choices(prompts, asked.n or 1)

        async def collect() -> None:
            async with aclosing(self._service.generate(prompts, params, asked.n or 1)) as deltas:
                async for index, delta in deltas:
                    choices[index].add(delta)

        await unless_gone(request, collect())
        return choices

    async def _stream(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        answer: fmt.Answer,
        chunk: Callable[[int, Delta], dict[str, Any]],
        opening: Callable[[int, None], dict[str, Any]] | None,
    ) -> AsyncIterator[bytes]:
        """Start the request and return its events; a refusal is raised here, while it can still be a
        status."""
        deltas = self._service.generate(prompts, params, asked.n or 1)
        try:
            first = await unless_gone(request, anext(deltas))
        except BaseException:
            await deltas.aclose()
            raise
        return self._events(first, deltas, asked, prompts, answer, chunk, opening)

    async def _events(
        self,
        first: tuple[int, Delta],
        deltas: Any,
        asked: GenerationRequest,
        prompts: list[list[int]],
        answer: fmt.Answer,
        chunk: Callable[[int, Delta], dict[str, Any]],
        opening: Callable[[int, None], dict[str, Any]] | None,
    ) -> AsyncIterator[bytes]:
        choices = _choices(prompts, asked.n or 1)
        options = asked.stream_options
        every = bool(options and options.continuous_usage_stats)
        num_prompt_tokens = _prompt_tokens(prompts)

        def encode(data: dict[str, Any]) -> bytes:
            if every:
                data["usage"] = fmt.usage(choices, num_prompt_tokens)
            return fmt.event(data)

        async with aclosing(deltas):
            try:
                if opening is not None:
                    for choice in choices:
                        yield encode(opening(choice.index, None))
                async for index, delta in _chain(first, deltas):
                    choices[index].add(delta)
                    if delta.text or delta.finish_reason or delta.logprobs:
                        yield encode(chunk(index, delta))
            except ApiError as error:  # the status line is long gone
                yield fmt.event(error_body(error.status, error.message, code=error.code))
                yield fmt.DONE
                return
            if options and options.include_usage:
                yield fmt.event(fmt.usage_chunk(answer, choices, num_prompt_tokens))
            yield fmt.DONE


async def _chain(first: tuple[int, Delta], rest: Any) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for item in rest:
        yield item


def _choices(prompts: list[list[int]], n: int) -> list[fmt.Choice]:
    return [fmt.Choice(index, prompts[index // n]) for index in range(len(prompts) * n)]


def _prompt_tokens(prompts: list[list[int]]) -> int:
    return sum(len(prompt) for prompt in prompts)


def parse(kind: type[R], body: bytes) -> R:
    """Check a request body; the first thing wrong becomes the error."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}" if where else message, param=where or None) from None
