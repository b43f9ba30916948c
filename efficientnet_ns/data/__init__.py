"""The input pipeline: tasks, records, images, augmentation and the datasets built from them."""
