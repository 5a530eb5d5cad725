"""The untrusted side: ciphertext storage and the supervisor. Holds no key."""
