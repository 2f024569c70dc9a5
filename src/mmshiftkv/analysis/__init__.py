"""Looks at models and caches from outside: statistics, and where kept tokens lie.  Nothing in the core needs it."""
