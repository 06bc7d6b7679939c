"""Ways in which a picture becomes pixels, a file each; fits preprocess.PictureMode."""
