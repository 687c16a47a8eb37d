"""Models on splats; start at encoder.py. build.py makes the one that a configuration describes.

A tensor's name may end with its shape, a letter or digit per dimension: `x_BTD` is [B, T, D],
`means_BN2` [B, N, 2]. Then it has this shape wherever it has this name. The docstring of each file
says what its letters mean; B images, N Gaussians, T tokens and D width are the same in all.
"""
