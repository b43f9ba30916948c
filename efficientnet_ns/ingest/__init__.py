"""Makes records from folders, archives, sets of TensorFlow Datasets and videos."""
