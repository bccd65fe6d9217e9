"""The TorchX component that launches runs."""
