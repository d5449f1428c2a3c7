"""(room to be built)"""
