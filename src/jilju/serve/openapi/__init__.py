"""OpenAPI: the description of the routes, made from their types."""
