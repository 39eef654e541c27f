"""`python -m prune2serve` is the `prune2serve` command."""

from prune2serve.cli import main

if __name__ == "__main__":
    main()
