"""Using a trained model: generation, INT8 weights, the service and its load test."""
