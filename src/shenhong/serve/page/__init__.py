"""The page's own API: chats, the jobs that answer in them, and training runs."""
