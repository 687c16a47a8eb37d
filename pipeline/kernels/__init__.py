"""Rendering backends. Each offers `render` (for autograd) and `loss_and_grad` (fused); see
`backend.py`."""
