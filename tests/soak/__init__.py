"""The soak: a real daemon under load, snapshots, kills and stops, judged from outside. See docs/TESTING.md."""
