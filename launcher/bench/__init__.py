"""Measurements that anyone can repeat: `expertpipe bench`, one file a subject, rows as JSON lines."""
