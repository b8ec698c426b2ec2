"""Images of a robot rendered by MuJoCo, with exact cameras, masks, depth and link ids."""
