"""Input side: tasks, records, images, augmentation and the datasets built from them."""
