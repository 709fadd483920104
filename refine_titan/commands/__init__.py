"""The command `refine-titan` and its subcommands.

Open main.py first. A subcommand is a module with `main(arguments)`, which returns the exit status: 0, 1 for a failure, 2 for a command line
that is wrong, 75 after a request to stop, 130 after Ctrl-C. It reads its arguments before it imports what takes seconds (torch, vLLM), so
that its help appears at once. ends.py says how errors end a command.
"""
