"""Model file formats: readers with checked arithmetic, number formats with their numpy unpacking. Knows no model and no text."""
