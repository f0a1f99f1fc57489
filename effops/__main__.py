"""`python -m effops`."""

from effops.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
