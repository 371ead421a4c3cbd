"""The DeepSeek-V3 architecture in one process: no distributed code, nothing imported from the other packages."""
