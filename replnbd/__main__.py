"""`python -m replnbd` is the `replnbd` command."""

from replnbd.cli import main

if __name__ == "__main__":
    main()
