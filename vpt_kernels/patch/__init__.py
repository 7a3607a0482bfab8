"""Replace a foreign model's patch embedding, projectors and rotary + cache update, reversibly and with a report."""
