"""The kernels of the CPU backend, from the bottom: simd, activations, tile, gates, dots, pack, team; then layers."""
