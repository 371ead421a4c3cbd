"""A run as one HTML page: `read` gathers it, `charts` and `heat` draw, `sections` explain, `page` puts it together."""
