"""Trained models for others: a published folder (weights, ONNX, model card), the app, and a Space that runs it."""
