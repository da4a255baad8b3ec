"""Foreign APIs, translated to the native one."""
