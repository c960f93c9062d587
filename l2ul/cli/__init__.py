"""Command lines: flags and their checks, exit codes, and what turns options into runs."""
