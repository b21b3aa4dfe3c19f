"""A trained model and images without labels -> masks in the images' own form and place."""
