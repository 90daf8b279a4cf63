"""`prx export`: a trained model for diffusers, as one file, or on the hub with its card."""
