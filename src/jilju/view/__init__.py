"""The pages, as static files served by the server."""
