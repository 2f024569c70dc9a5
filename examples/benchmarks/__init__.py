"""Measurements that the documents quote: of quality and of speed."""
