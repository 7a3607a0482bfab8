"""What replaces parts of a foreign model, reversibly and with a report, lives here; it may import append_visual_kv,
control_cross_attention, roi_patch_embed, caches, checks and guard."""
