"""The engine `native`: prefills a prompt once per group and decodes from a shared key-value cache."""
