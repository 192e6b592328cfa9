"""Training: texts and chats as arrays of tokens."""
