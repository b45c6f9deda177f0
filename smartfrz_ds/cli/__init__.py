"""The `smartfrz` command."""
