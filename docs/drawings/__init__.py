"""Pictures of the site. Each depends on this code only: `python -m docs.drawings [NAME ...]`."""
