"""What makes pages of the site out of the code, when the site is built. None of it imports torch or Composer."""
