"""Models: hyper-parameters, the decoder written once, weights, and where model files come from."""
