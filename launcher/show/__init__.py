"""Pictures and terminal views: curves, schedules in time, progress."""
