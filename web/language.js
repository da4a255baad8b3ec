// The texts of the page in the language of the visitor. The server has chosen it and put its texts into the page.

const { language, texts } = JSON.parse(document.getElementById("texts").textContent);

/** British, because American lists have a comma before "and". */
export const LOCALE = language === "en" ? "en-GB" : language;
const plurals = new Intl.PluralRules(LOCALE);
const lists = new Intl.ListFormat(LOCALE, { type: "conjunction" });
const YEAR_S = 365 * 24 * 3600;

/** The text of this name. Its {placeholders} become `values`; one with plural forms is chosen by `values.n`. */
export function t(name, values = {}) {
  let text = texts[name] ?? name;
  if (typeof text === "object") text = text[plurals.select(values.n)] ?? text.other;
  return text.replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}

/** ["a", "b", "c"] -> "a, b and c" */
export const listed = (names) => lists.format(names);

/** 1.25 -> "1.3", in German "1,3" */
export const decimal = (number, digits = 1) =>
  number.toLocaleString(LOCALE, { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** 0.0256 -> "0.026", in German "0,026" */
export const rounded = (number, digits = 2) => number.toLocaleString(LOCALE, { maximumSignificantDigits: digits });

/** Makes the field change the language of this and the other pages. Nothing is lost: the page keeps its state. */
export function languageField(select) {
  select.value = language;
  select.addEventListener("change", () => {
    document.cookie = `language=${select.value}; max-age=${YEAR_S}; samesite=lax`;
    location.reload();
  });
}
