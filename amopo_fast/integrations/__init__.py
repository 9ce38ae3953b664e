"""Shared prefixes inside of trainers of others, a file each, imported only when asked for: docs/integrations.md."""
