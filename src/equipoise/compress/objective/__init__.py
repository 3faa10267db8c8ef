"""What training minimises: the loss of the task, and the distance from a teacher."""
