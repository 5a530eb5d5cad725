"""The OpenAI-compatible gateway and the admin socket, in the normal world."""
