"""The commands of `expertpipe`, one file each; those with several files of their own have a folder beside this one."""
