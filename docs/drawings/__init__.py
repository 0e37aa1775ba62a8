"""The site's pictures, each a function of nothing but this code: `python -m docs.drawings [NAME ...]`."""
