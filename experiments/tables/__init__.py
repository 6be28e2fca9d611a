"""The paper's tables: how a table is declared, trained and written; experiments/table1.py to table6.py declare them."""
