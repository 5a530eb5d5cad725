"""The worlds: one way each to have a normal world, a secure world and a monitor between them."""
