"""What training does to crops: operations on pixels, policies that draw them, and erasing."""
