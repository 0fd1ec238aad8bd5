"""Problems with verifiable answers; a task of your own is one class."""
