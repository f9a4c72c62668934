"""Portable graphs to what one backend takes, and the lint that refuses what would be silently wrong."""
