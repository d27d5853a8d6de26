"""The commands of `d2kd`; the table of them all is d2kd_cli.COMMANDS."""
