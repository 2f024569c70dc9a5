"""What people do with an image: conversations and documents, over any supported model and its processor."""
